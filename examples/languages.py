"""An LSTM that tells which of 46 languages a short text is in, letter by letter.

CLAIM

Data: the translated messages of Django and Wagtail; tested on those of Sphinx and Django REST framework, two projects
that it has never seen. What to fetch first, and how it is served: examples/README.md.
"""

import argparse
import random
import re
import struct
import time
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import NamedTuple
from zlib import crc32

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad
from torch.nn.utils.rnn import pad_sequence

from examples.publish import Inputs, publish
from training.devices import deterministic
from training.errors import DataError

# ---------------------------------------------------------------------------------------------------------------------
# Texts. Wheels are zip files, and a catalogue of messages in one is a table of (English, translation).

TRAINED_ON = ("django", "wagtail")
TESTED_ON = ("sphinx", "djangorestframework")

LANGUAGES = (
    "ar", "az", "bg", "bn", "ca", "cs", "cy", "da", "de", "el", "en", "es", "et", "eu", "fa", "fi",
    "fr", "gl", "hi", "hr", "hu", "hy", "id", "it", "ja", "ka", "ko", "lt", "lv", "mk", "nb", "ne",
    "nl", "pl", "pt", "ro", "ru", "sk", "sl", "sq", "sr", "sv", "tr", "uk", "vi", "zh",
)  # fmt: skip
"""ISO 639-1. Those with at least 400 messages to learn from and 80 to be tested on; pt-BR is pt, zh-Hant is zh."""

CATALOGUE = re.compile(r"locale/([a-z]{2})(?:[_@]\w+)?/LC_MESSAGES/\w+\.mo$")
PLACEHOLDER = re.compile(r"%(\(\w+\))?[#0 +-]?\d*[sdifr]|\{[^}]*\}|<[^>]*>|&\w+;|``?|:\w+:")
FEWEST_LETTERS = 6


class Text(NamedTuple):
    """A message in one language."""

    text: str
    label: int
    held_out: bool
    """The same for all translations of one message: none of them is learnt from."""


def read_texts(wheels: Path, projects: Sequence[str]) -> list[Text]:
    """Read what the wheels of some projects say in each language, in an order that is always the same."""
    found = dict[tuple[str, str], bool]()
    for project in projects:
        with zipfile.ZipFile(find_wheel(wheels, project)) as archive:
            for name in sorted(archive.namelist()):
                if (match := CATALOGUE.search(name)) and match[1] in LANGUAGES:
                    for original, translation in messages(archive.read(name)):
                        held_out = crc32(original.encode()) % 10 == 0
                        for language, text in (("en", original), (match[1], translation)):
                            # Many a message is left in English, and then teaches the wrong language.
                            if language == "en" or translation != original:
                                found.setdefault((clean(text), language), held_out)
    return [
        Text(text, LANGUAGES.index(language), held_out)
        for (text, language), held_out in sorted(found.items())
        if sum(map(str.isalpha, text)) >= FEWEST_LETTERS
    ]


def find_wheel(wheels: Path, project: str) -> Path:
    """Return a project's wheel.

    Raises:
        DataError: it is not there.
    """
    found = [path for path in sorted(wheels.glob("*.whl")) if path.name.lower().startswith(f"{project}-")]
    if not found:
        raise DataError(f"{wheels} has no wheel of {project}: see examples/README.md for the command that fetches it.")
    return found[-1]


def messages(catalogue: bytes) -> Iterator[tuple[str, str]]:
    """Yield (English, translation) from a gettext .mo file, singular forms only."""
    order = "<" if catalogue[:4] == b"\xde\x12\x04\x95" else ">"
    count, *tables = struct.unpack_from(f"{order}3I", catalogue, 8)
    spans = [struct.iter_unpack(f"{order}2I", catalogue[at : at + 8 * count]) for at in tables]
    for pair in zip(*spans, strict=True):
        original, translation = (catalogue[at : at + size].decode().split("\0")[0] for size, at in pair)
        # The empty message is the file's header; before \4 stands a context, which is English too.
        if original:
            yield original.rpartition("\4")[2], translation


def clean(text: str) -> str:
    """Leave only what a person reads."""
    return " ".join(PLACEHOLDER.sub(" ", text).split())


# ---------------------------------------------------------------------------------------------------------------------
# The network.


class LanguageNetwork(nn.Module):
    """int64 code points `[n, t]` and lengths `[n]` → float32 probabilities `[n, 46]`.

    What stands behind a text's length is not looked at, whatever it is: the answer is the same alone and in a batch.
    """

    numbers: Tensor

    def __init__(self, alphabet: str, classes: int, width: int = 32, hidden: int = 128) -> None:
        super().__init__()
        # A letter of the alphabet has a number of its own; all others share one with the 256 around them, so that a
        # rare letter still says which script it is of.
        numbers = torch.arange(0x10000) >> 8
        numbers[[ord(letter) for letter in alphabet]] = 256 + torch.arange(len(alphabet))
        self.register_buffer("numbers", numbers.to(torch.int16))
        self.embedding = nn.Embedding(256 + len(alphabet), width)
        self.recurrent = nn.LSTM(width, hidden, batch_first=True)
        self.output = nn.Linear(hidden, classes)
        self.dropout = nn.Dropout(0.2)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Classify a batch."""
        return self.logits(tokens, lengths).softmax(dim=1)

    def logits(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Score a batch: float32 `[n, classes]`."""
        # One column more, and an empty text is one that can be answered too.
        codes = pad(tokens, (0, 1)).clamp(0, 0xFFFF)
        states, _ = self.recurrent(self.dropout(self.embedding(self.numbers[codes].long())))
        read = torch.arange(codes.shape[1], device=codes.device) < lengths[:, None]
        # An LSTM's states lie above -1. It reads from the left, so that those of a text know nothing of the padding.
        strongest = states.masked_fill(~read[:, :, None], -1.0).amax(dim=1)
        scores: Tensor = self.output(self.dropout(strongest))
        return scores


def as_batch(texts: Sequence[str]) -> Inputs:
    """Return the network's two inputs for some texts."""
    codes = [torch.tensor([ord(letter) for letter in text], dtype=torch.int64) for text in texts]
    lengths = torch.tensor([len(text) for text in texts])
    return {"tokens": pad_sequence(codes, batch_first=True), "lengths": lengths}


def choose_alphabet(texts: Sequence[str]) -> str:
    """Return the letters that are seen at least 20 times."""
    seen = Counter(letter for text in texts for letter in text)
    return "".join(sorted(letter for letter, times in seen.items() if times >= 20 and ord(letter) < 0x10000))


# ---------------------------------------------------------------------------------------------------------------------
# Training.

EPOCHS = 10
BATCH = 64
PER_LANGUAGE = 600
"""Texts of each language in an epoch, so that none is learnt at the cost of another."""
SHORTEST, LONGEST = 10, 64
"""Letters of a piece cut out of a text, so that a few words are enough later."""
LEARNING_RATE = 5e-3


def train(texts: Sequence[Text], epochs: int, seed: int) -> LanguageNetwork:
    """Train a network. The same texts, epochs, seed and processor give the same weights."""
    deterministic()
    torch.manual_seed(seed)
    dice = random.Random(seed)
    network = LanguageNetwork(choose_alphabet([text.text for text in texts]), len(LANGUAGES))
    optimiser = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE)
    plan = [draw_epoch(texts, dice) for _ in range(epochs)]
    steps = sum(map(len, plan))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, LEARNING_RATE, total_steps=steps, pct_start=0.2)
    network.train()
    for number, batches in enumerate(plan, start=1):
        began, losses = time.monotonic(), list[float]()
        for batch in batches:
            inputs, labels = as_batch([text for text, _ in batch]), torch.tensor([label for _, label in batch])
            loss = cross_entropy(network.logits(*inputs.values()), labels)
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            losses.append(loss.item())
        print(f"epoch {number}/{epochs}: loss {fmean(losses):.3f}, {time.monotonic() - began:.0f} s", flush=True)
    return network.eval()


def draw_epoch(texts: Sequence[Text], dice: random.Random) -> list[list[tuple[str, int]]]:
    """Draw pieces of texts, as many of each language, in batches of about one length."""
    pieces = list[tuple[str, int]]()
    for label in range(len(LANGUAGES)):
        own = [text.text for text in texts if text.label == label]
        pieces += [(cut(text, dice), label) for text in dice.sample(own, min(PER_LANGUAGE, len(own)))]
    dice.shuffle(pieces)
    pieces.sort(key=lambda piece: len(piece[0]))
    batches = [pieces[at : at + BATCH] for at in range(0, len(pieces), BATCH)]
    dice.shuffle(batches)
    return batches


def cut(text: str, dice: random.Random) -> str:
    """Cut out a piece of 10 to 64 letters; a shorter text stays whole."""
    size = dice.randint(SHORTEST, LONGEST)
    begin = dice.randint(0, max(0, len(text) - size))
    return text[begin : begin + size]


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation, export.


def accuracy(network: LanguageNetwork, texts: Sequence[Text]) -> float:
    """Return the share of texts whose language is the most probable."""
    texts = sorted(texts, key=lambda text: len(text.text))
    right = 0
    for at in range(0, len(texts), 256):
        batch = texts[at : at + 256]
        with torch.inference_mode():
            found = network(*as_batch([text.text for text in batch]).values()).argmax(dim=1)
        right += int((found == torch.tensor([text.label for text in batch])).sum())
    return right / len(texts)


def report(network: LanguageNetwork, name: str, texts: Sequence[Text]) -> None:
    """Print the accuracy on all texts, and on the short and the long ones."""
    parts = {"all": texts}
    for least, most in ((0, 20), (20, 50), (50, 10**6)):
        parts[f"{least}-{most - 1} letters" if most < 10**6 else f"{least} letters and more"] = [
            text for text in texts if least <= len(text.text) < most
        ]
    for part, chosen in parts.items():
        print(f"{name}, {part}: {accuracy(network, chosen):.2%} of {len(chosen):,}")


def main() -> None:
    """Train, evaluate, export."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheels", type=Path, default=Path(".cache/languages"), help="folder with the wheels")
    parser.add_argument("--out", type=Path, default=Path("runs/models/languages/1"), help="folder to export to")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    known = read_texts(args.wheels, TRAINED_ON)
    texts, held_out = [text for text in known if not text.held_out], [text for text in known if text.held_out]
    seen = {text.text for text in known}
    unseen = [text for text in read_texts(args.wheels, TESTED_ON) if text.text not in seen]
    began = time.monotonic()
    network = train(texts, args.epochs, args.seed)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    print(f"{parameters:,} parameters, {len(texts):,} texts, {time.monotonic() - began:.0f} s of training")
    report(network, "messages held out", held_out)
    report(network, "projects never seen", unseen)

    batches = [
        as_batch([text.text for text in unseen[at :: len(unseen) // size][:size]])
        for at, size in ((0, 7), (1, 1), (2, 64))
    ]
    difference = publish(network, args.out, batches, {"tokens": ("n", "t"), "lengths": ("n",)}, LANGUAGES)
    print(f"{args.out}/model.onnx: within {difference:.1g} of PyTorch")


if __name__ == "__main__":
    main()
