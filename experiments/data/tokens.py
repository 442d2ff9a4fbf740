"""Makes a file of tokens of a text, for data=tokens.

python -m experiments.data.tokens TEXT OUT.bin                  one token a byte of the text, 256 in all
python -m experiments.data.tokens TEXT OUT.bin --characters     one a character, numbered in the order of their code
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from experiments.atomic import atomic_write
from experiments.errors import UserError, command_line

MOST = 2**16  # words that two bytes can tell apart


def tokenize(text: bytes, characters: bool) -> tuple[NDArray[np.uint16], int]:
    """The tokens, and how many words there are."""
    if not characters:
        return np.frombuffer(text, np.uint8).astype(np.uint16), 256
    try:
        codes = np.frombuffer(text.decode().encode("utf-32-le"), np.uint32)
    except UnicodeDecodeError as error:
        raise UserError(f"the text is not UTF-8 ({error}): leave --characters away") from error
    words, tokens = np.unique(codes, return_inverse=True)
    if len(words) > MOST:
        raise UserError(f"{len(words)} characters do not fit into two bytes: leave --characters away")
    return tokens.astype(np.uint16), len(words)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--characters", action="store_true")
    arguments = parser.parse_args()
    with command_line("interrupted: nothing was written"):
        try:
            tokens, words = tokenize(arguments.text.read_bytes(), arguments.characters)
            with atomic_write(arguments.out) as file:
                file.write(tokens.tobytes())
        except OSError as error:
            raise UserError(f"{error.filename}: {error.strerror}") from error
        print(f"{len(tokens):,} tokens: data=tokens data.path={arguments.out} data.words={words}")


if __name__ == "__main__":
    main()
