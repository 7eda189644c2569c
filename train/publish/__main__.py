"""`python -m train.publish run=runs/NAME repo=OWNER/NAME`: a finished run as a folder for the
Hugging Face Hub.
"""

from conf.command import start

if __name__ == "__main__":
    start("publish", "train.publish.command")
