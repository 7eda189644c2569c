"""`python -m train store=PATH [layer=21] [run=runs/NAME] [sae=...] [optim=...]`: SAEs from a
store.
"""

from residual_saes.conf.command import start

if __name__ == "__main__":
    start("train", "residual_saes.train.command")
