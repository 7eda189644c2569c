"""`python -m train.export run=runs/NAME to=saelens`: a finished run's SAE in the files of other
libraries.
"""

from residual_saes.conf.command import start

if __name__ == "__main__":
    start("export", "residual_saes.train.export.command")
