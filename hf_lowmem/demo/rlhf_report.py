from dataclasses import dataclass, asdict
import json
@dataclass(frozen=True)
class Stage:
    parameters: int
    state_bytes: int
    state_bytes_per_parameter: float
    state_bytes_per_parameter_outside_embeddings: float
    seconds: float
    figures: dict
    curves: dict
@dataclass(frozen=True)
class Pipeline:
    optim: str
    stages: dict
def print_table(ps, console):
    for p in ps:
        for n,s in p.stages.items(): console.print(p.optim, n, s.state_bytes, round(s.seconds,1), {k:round(v,3) for k,v in s.figures.items()})
def save_png(*a): pass
def save_json(pipelines, settings, device, seconds, path):
    path.write_text(json.dumps([asdict(p) for p in pipelines]))
