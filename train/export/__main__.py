"""`python -m train.export run=runs/NAME to=saelens`: a finished run's SAE in the files of other
libraries.
"""

from residual_saes.conf.console import run

if __name__ == "__main__":
    run("export")
