"""`python -m train.publish run=runs/NAME repo=OWNER/NAME`: a run as a folder for the Hub."""

from residual_saes.conf.command import start

if __name__ == "__main__":
    start("publish", "residual_saes.train.publish.command")
