"""`python -m train.publish run=runs/NAME repo=OWNER/NAME`: a run as a folder for the Hub."""

from conf.command import start

if __name__ == "__main__":
    start("publish", "train.publish.command")
