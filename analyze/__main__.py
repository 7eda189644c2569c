"""`python -m analyze study=NAME run=runs/NAME`: what a trained SAE is worth."""

from residual_saes.conf.console import run

if __name__ == "__main__":
    run("analyze")
