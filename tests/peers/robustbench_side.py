"""Run by RobustBench's python: loads a submission of ours with their code.

    robustbench_side.py FOLDER NAME DATASET NORM IMAGES

FOLDER is what `launch/export.py --robustbench` wrote and IMAGES a file of (n, 3, H, W) pixels.
Prints a JSON object: the labels that their network gives the images, and their table of models.
"""

import contextlib
import io
import json
import os
import runpy
import shutil
import sys
from pathlib import Path

import torch
from robustbench.model_zoo import model_dicts
from robustbench.model_zoo.enums import BenchmarkDataset, ThreatModel
from robustbench.utils import (
    ModelInfo,
    get_leaderboard_bibtex,
    get_leaderboard_latex,
    list_available_models,
    load_model,
    update_json,
)

folder, name, dataset, norm, images = sys.argv[1:]
os.chdir(folder)
keys = BenchmarkDataset(dataset), ThreatModel(norm)

entry = runpy.run_path("model_zoo_entry.py")["ENTRY"]
assert entry[0] == name
models = model_dicts[keys[0]][keys[1]]
models.clear()
models.update([entry])

# Where they look for a file before they download one.
place = Path("models") / dataset / norm
place.mkdir(parents=True)
shutil.copyfile(f"{name}.pt", place / f"{name}.pt")
network = load_model(name, model_dir="models", dataset=dataset, threat_model=norm)
assert not network.training
pixels = torch.load(images)
with torch.no_grad():
    logits = network(pixels)

text = Path("model_info", dataset, norm, f"{name}.json").read_text()
fields = set(ModelInfo.__dataclass_fields__)
assert set(json.loads(text)) <= fields, set(json.loads(text)) - fields
with contextlib.redirect_stdout(io.StringIO()) as table:
    list_available_models(dataset, norm)
    get_leaderboard_bibtex(dataset, norm)
    latex = get_leaderboard_latex(dataset, norm, sort_by="autoattack_acc")

# Their own writer takes our file for one of theirs: it changes what it measures, nothing else.
before = json.loads(text)
update_json(*keys, name, 0.5, 0.25, before["eps"])
after = json.loads(Path("model_info", dataset, norm, f"{name}.json").read_text())
assert after == before | {"clean_acc": "50.0", "autoattack_acc": "25.0"}, after

print(
    json.dumps(
        {
            "labels": logits.argmax(1).tolist(),
            "logits": logits.tolist(),
            "table": table.getvalue(),
            "latex": latex,
        }
    )
)
