"""`python -m residual_saes COMMAND ...`: the console command where its folder is not on PATH."""

from residual_saes.conf.console import main

if __name__ == "__main__":
    main()
