"""`python -m harvest`: text through a language model into an activation store."""

from residual_saes.conf.console import run

if __name__ == "__main__":
    run("harvest")
