"""docs/python.md: its scripts run as written, each on its own."""

import contextlib
import io
import re

from conftest import REPOSITORY

PAGE = (REPOSITORY / "docs/python.md").read_text()
SCRIPTS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def test_the_scripts_of_the_page_run_and_print(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/mine").symlink_to(trained)
    said = []
    for script in SCRIPTS:
        names: dict = {}
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(script, names)
        said.append(out.getvalue().splitlines()[-1])
    alike, shape, kernel, trained_on = said
    assert re.fullmatch(r"\['(\d)', '\1'\]", alike)
    assert shape == "torch.Size([2, 100])"
    assert kernel == "torch.Size([4, 4])"
    error, kept = re.fullmatch(r"(.*) % of 360 images (.*)", trained_on).groups()
    values = names["trainer"].callback_metrics
    assert {"val_error", "val_top5_error", "val_loss"} == values.keys()
    assert f"{float(values['val_error']):.2f}" == error
    assert all(f"`{key}`" in PAGE for key in names["task"].scores)
    assert float(names["best"].best_model_score) <= float(error) + 0.01
    assert (tmp_path / kept).is_file()
