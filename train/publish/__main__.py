"""`python -m train.publish run=runs/NAME repo=OWNER/NAME`: a run as a folder for the Hub."""

from residual_saes.conf.console import run

if __name__ == "__main__":
    run("publish")
