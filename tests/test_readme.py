"""The README's example runs as it stands there."""

import re
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def test_example_of_the_losses(capsys):
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    exec(compile(example, str(README), "exec"), {})
    loss, alignment = map(float, capsys.readouterr().out.split())
    assert loss > 0
    assert 0 < alignment < 0.1  # Random vectors are nearly orthogonal.
