"""`python -m harvest`: text through a language model into an activation store."""

from conf.command import start

if __name__ == "__main__":
    start("harvest", "harvest.command")
