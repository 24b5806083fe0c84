"""Which tasks did Bansal et al. ask, and how do ours differ from theirs?

`bansal14` is the paper's 14 tasks (Bansal et al. 2023, arXiv 2212.09095), `bansal16` adds the two
that its rankings never saw. They are lm-eval's of these names, but for those in `CORRECTED`,
whose names stand for the definitions in `probes/bansal_tasks` wherever they are given.

    name            prompt, up to the choices                       metric    prompt differs
    arc_easy        Question: {question} ⏎ Answer:                  acc       no
    arc_challenge   the same                                        acc       no
    openbookqa      {question_stem}                                 acc       no
    hellaswag       {activity}: {ctx_a} {Ctx_b}, [..] removed       acc       no
    piqa            Question: {goal} ⏎ Answer:                      acc       no
    winogrande      sentence up to _ + option; its rest is scored   acc       no
    boolq           {passage} ⏎ Question: {question}? ⏎ Answer:     acc       no
    cb              .. {hypothesis}. True, False or Neither? ..     acc       no (lm-eval: a comma)
    copa            premise less its full stop, because/therefore   acc       no (lm-eval: 2 blanks)
    multirc         .. {answer} ⏎ Is the answer correct? yes/no     acc_all   no (lm-eval: below)
    record          passage, highlights; query with every entity    em, f1    no (lm-eval: a blank)
    rte             .. Question: {sentence2} True or False? ..      acc       no
    wic             .. Is the word '{w}' used in the same way ..    acc       no
    wsc             .. does the pronoun "*{p}*" refer to ..         acc       demonstrations
    mathqa          Question: {Problem} ⏎ Answer:                   acc       demonstrations
    lambada_openai  text less its last word, greedy                 acc       no (lm-eval: 2 blanks)

Shown to differ: the reference shows (and takes importance from) WSC's positive examples only, so
that every demonstration says yes; here both. Its MathQA demonstrations lack the blank after
"Answer:". lm-eval's MultiRC counts "no" as right where the label says the answer is right; its
ReCoRD does not load beside transformers 5. `acc` of MultiRC is per answer here, `acc_all` per
question, as the paper has it; `acc` of ReCoRD is em.

Splits: arc_*, openbookqa and mathqa report test, the others validation (hidden test labels);
importance and demonstrations come from train. LAMBADA has none: lambada_openai, the paper's text
(5153), is halved, and the half that is not reported is chosen by and shown from; the paper used the
reported examples for both. lambada_standard has a validation split for that. The paper takes the
first 2500 training examples: give that as the limit.

Tokens: the reference puts no BOS before a prompt and encodes context and choice apart. Here they
are encoded as lm-eval does (probes/tokenising.py), with what the tokenizer puts before a text
(`</s>` for OPT, which was trained so); `prepare(…, bos=False)` leaves it out, bos=True demands one.
Its evaluation scores " " + choice, but its importance, of the tasks in `UNSPACED`, the choice
without the blank: `load_tasks(UNSPACED, …, leading_space=False)`. By default both
have it.

Fields of a record, as on the hub, for a data folder (probes/task_data.py):

    arc_*           question, choices {text, label}, answerKey      (dataset allenai/ai2_arc)
    openbookqa      question_stem, choices {text, label}, answerKey (allenai/openbookqa)
    hellaswag       activity_label, ctx_a, ctx_b, endings, label    (Rowan/hellaswag)
    piqa            goal, sol1, sol2, label                         (baber/piqa)
    winogrande      sentence, option1, option2, answer "1" or "2"   (allenai/winogrande)
    boolq           passage, question, label                        (aps/super_glue, to wsc)
    cb              premise, hypothesis, label 0, 1, 2: True, False, Neither
    copa            premise, question cause/effect, choice1, choice2, label
    multirc         paragraph, question, answer, label, idx {paragraph, question, answer}
    record          passage, query, entities, answers
    rte             sentence1, sentence2, label 0: True             (nyu-mll/glue)
    wic             sentence1, sentence2, start1, end1, label
    wsc             text, span1_text, span2_text, span2_index (in words), label
    mathqa          Problem, options "a ) 1 , b ) 2 , …", correct   (regisss/math_qa)
    lambada_*       text                                            (EleutherAI/lambada_openai)
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

BANSAL14 = (
    *("arc_easy", "arc_challenge", "openbookqa", "hellaswag", "piqa", "winogrande"),
    *("boolq", "cb", "copa", "multirc", "record", "rte", "wic", "wsc"),
)
"""The tasks of the paper."""
UNSEEN = ("mathqa", "lambada_openai")
"""The tasks that its rankings were tried on without having seen them."""
PRESETS: Mapping[str, tuple[str, ...]] = {"bansal14": BANSAL14, "bansal16": (*BANSAL14, *UNSEEN)}
SHOTS = (0, 1, 5)
"""The numbers of demonstrations of the paper."""
UNSPACED = ("arc_easy", "arc_challenge", "openbookqa", "hellaswag", "piqa")
"""Tasks whose choices the reference's importance scores without their leading blank."""
CORRECTED = ("cb", "copa", "multirc", "record", "lambada_openai", "lambada_standard")
"""Tasks that are ours, not lm-eval's: what is wrong with those is said in their YAML files."""
CORRECTED_FOLDER = Path(__file__).parent / "bansal_tasks"
