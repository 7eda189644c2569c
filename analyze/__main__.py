"""`python -m analyze study=NAME run=runs/NAME`: what a trained SAE is worth."""

from residual_saes.conf.command import start

if __name__ == "__main__":
    start("analyze", "residual_saes.analyze.command")
