"""`python -m torchtitan_lite`: the same as the command `torchtitan-lite`."""

from torchtitan_lite.cli import program

if __name__ == "__main__":
    program()
