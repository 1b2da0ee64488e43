"""Plain modules in, plain modules out: plan, apply, prune, save; and what the smaller network is proved to keep."""

from ellq.pruning.apply import apply as apply
from ellq.pruning.artefact import load as load
from ellq.pruning.artefact import save as save
from ellq.pruning.artefact import write_into as write_into
from ellq.pruning.chain_bounds import chain_bounds as chain_bounds
from ellq.pruning.coupling import HiddenLayer as HiddenLayer
from ellq.pruning.coupling import hidden_layers as hidden_layers
from ellq.pruning.guarantee import Guarantee as Guarantee
from ellq.pruning.guarantee import guarantee as guarantee
from ellq.pruning.hidden_units import plan_hidden_units as plan_hidden_units
from ellq.pruning.plan import Correction as Correction
from ellq.pruning.plan import Plan as Plan
from ellq.pruning.prune import plan as plan
from ellq.pruning.prune import prune as prune
from ellq.pruning.sweep import Splits as Splits
from ellq.pruning.sweep import largest_within as largest_within
from ellq.pruning.sweep import sweep as sweep
from ellq.pruning.training import train_classifier as train_classifier
from ellq.pruning.verify_nets import verify_id as verify_id
