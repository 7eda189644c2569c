"""`python -m harvest`: text through a language model into an activation store."""

from residual_saes.conf.command import start

if __name__ == "__main__":
    start("harvest", "residual_saes.harvest.command")
