"""`python -m train.export run=runs/NAME to=saelens`: a finished run's SAE in the files of other
libraries.
"""

from conf.command import start

if __name__ == "__main__":
    start("export", "train.export.command")
