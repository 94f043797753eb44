"""The README's examples run as they stand there."""

import re
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def test_examples(capsys):
    """In their order, in one namespace: later ones use the names of earlier ones."""
    examples = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(examples) == 3
    namespace = {}
    for example in examples:
        exec(compile(example, str(README), "exec"), namespace)
    loss, alignment = map(float, capsys.readouterr().out.splitlines()[0].split())
    assert loss > 0
    assert 0 < alignment < 0.1  # Random vectors are nearly orthogonal.
    scores, found = namespace["retrieval"].search(namespace["index"], namespace["z"][:4, 0], k=3)
    assert scores.shape == found.shape == (4, 3)
