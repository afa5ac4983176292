"""`python -m tandem` is the `tandem` command."""

from tandem.cli.main import app

if __name__ == "__main__":
    app(prog_name="tandem")
