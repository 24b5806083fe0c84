"""What do COPA, MultiRC and ReCoRD ask, and how is ReCoRD marked?

The YAML files beside this one name these functions; each takes one document of SuperGLUE. ReCoRD's
marks are SQuAD's (Rajpurkar et al. 2016), of the chosen entity against the best of the right ones:

    em  equal, once lower-cased and rid of punctuation, articles (a, an, the) and double blanks
    f1  2PR / (P + R), P and R being the shares of the words of the one that the other has
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

Doc = Mapping[str, Any]

CONNECTORS = {"cause": "because", "effect": "therefore"}
ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)


def copa_text(doc: Doc) -> str:
    """The premise without its full stop, and the word for what is asked."""
    return f"{doc['premise'].strip()[:-1]} {CONNECTORS[doc['question']]}"


def copa_choices(doc: Doc) -> list[str]:
    """Both alternatives, going on in lower case."""
    return [doc[key][:1].lower() + doc[key][1:] for key in ("choice1", "choice2")]


def multirc_choices(doc: Doc) -> list[str]:
    """The answer called wrong, and called right: in the order of the labels 0 and 1."""
    return [f"{doc['answer']}\nIs the answer correct? {word}" for word in ("no", "yes")]


def record_documents(documents: Any) -> Any:
    """Every entity and answer once, sorted, as lm-eval has them."""
    return documents.map(
        lambda doc: {key: sorted(set(doc[key])) for key in ("entities", "answers")}
    )


def record_text(doc: Doc) -> str:
    """The passage, then its highlights as a list, which the query goes on with."""
    passage, *highlights = doc["passage"].strip().split("\n@highlight\n")
    return f"{passage}\n\n" + "".join(f"  - {highlight}.\n" for highlight in highlights)


def record_choices(doc: Doc) -> list[str]:
    """The query, filled with one entity after the other."""
    return [_filled(doc, entity) for entity in doc["entities"]]


def record_answers(doc: Doc) -> list[int]:
    """The numbers of all right entities."""
    return [i for i, entity in enumerate(doc["entities"]) if entity in doc["answers"]]


def record_first_answer(doc: Doc) -> str:
    """What a demonstration shows."""
    return _filled(doc, doc["answers"][0])


def _filled(doc: Doc, entity: str) -> str:
    return f"  - {doc['query']}".replace("@placeholder", entity)


def record_marks(doc: Doc, results: Sequence[tuple[float, bool]]) -> dict[str, float]:
    """em and f1 of the most likely entity; acc is em, under the name that all tasks share."""
    nats = [value for value, _ in results]
    chosen = doc["entities"][nats.index(max(nats))]
    em = max(float(normalised(chosen) == normalised(answer)) for answer in doc["answers"])
    return {"acc": em, "em": em, "f1": max(word_f1(chosen, answer) for answer in doc["answers"])}


def normalised(text: str) -> str:
    """What two answers must have in common to be the same."""
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


def word_f1(chosen: str, answer: str) -> float:
    """Overlap of their words; of a text without words, whether both are."""
    one, other = normalised(chosen).split(), normalised(answer).split()
    if not one or not other:
        return float(one == other)
    common = sum((Counter(one) & Counter(other)).values())
    return 2 * common / (len(one) + len(other))
