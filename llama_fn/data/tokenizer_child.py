"""Trains a sentencepiece model in a process of its own, so that its log is apart and an interruption ends it at once.

Run as a file by tokenizer.train. Standard input is JSON: the lines to train on and sentencepiece's options. The model
goes to the file that is named, the log to standard error. Status 1: sentencepiece refuses; the last line says why.
"""

import json
import sys

import sentencepiece as spm


def main() -> None:
    """Train what is asked for."""
    asked = json.load(sys.stdin)
    try:
        with open(sys.argv[1], "wb") as model:
            spm.SentencePieceTrainer.train(
                sentence_iterator=iter(asked["lines"]), model_writer=model, **asked["options"]
            )  # fmt: skip
    except RuntimeError as error:
        print("\n" + " ".join(str(error).split()), file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
