"""`python -m train store=PATH [layer=21] [run=runs/NAME] [sae=...] [optim=...]`: SAEs from a
store.
"""

from residual_saes.conf.console import run

if __name__ == "__main__":
    run("train")
