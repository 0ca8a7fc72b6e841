"""SPRINT inside models that exist: `wrap`, `check`, and declarations of architectures.

`known` is what `wrap` knows of others' models, `layouts` where their tokens stand, `declare` the words in which it is said,
`checking` what proves a wrapping; how tokens find their way while a host's own forward runs is in `mechanism`.
"""

from sprint.hosts import known as _known  # fills the register
from sprint.hosts.checking import Report, check
from sprint.hosts.declare import Blocks, Host, Table, register, registered
from sprint.hosts.wrapping import path, unwrap, wrap

__all__ = ["Blocks", "Host", "Report", "Table", "check", "path", "register", "registered", "unwrap", "wrap"]
del _known
