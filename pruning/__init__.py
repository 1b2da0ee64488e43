"""Plain modules in, plain modules out: plan, apply, prune, save; and what the smaller network is proved to keep."""

from ellq.pruning.artefact import load as load
from ellq.pruning.artefact import save as save
from ellq.pruning.coupling import HiddenLayer as HiddenLayer
from ellq.pruning.coupling import hidden_layers as hidden_layers
from ellq.pruning.hidden_units import plan_hidden_units as plan_hidden_units
from ellq.pruning.plan import Correction as Correction
from ellq.pruning.plan import Plan as Plan
from ellq.pruning.prune import apply as apply
from ellq.pruning.prune import plan as plan
from ellq.pruning.prune import prune as prune
