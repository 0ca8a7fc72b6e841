"""What a model costs on each path, before a GPU is rented: counted work, rates of devices, and what follows.

`counting` counts one call, `paths` those of a model, `hardware` has the rates, `predict` the answer.
"""

from sprint.costs.counting import PathCost
from sprint.costs.hardware import Hardware
from sprint.costs.predict import Cost, cost

__all__ = ["Cost", "Hardware", "PathCost", "cost"]
