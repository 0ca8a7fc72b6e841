"""SPRINT inside models that exist: `wrap`, `check`, and declarations of architectures."""

from sprint.hosts import known as _known  # fills the register
from sprint.hosts.check import Report, check
from sprint.hosts.declare import Blocks, Host, Table, register, registered
from sprint.hosts.wrapping import path, unwrap, wrap

__all__ = ["Blocks", "Host", "Report", "Table", "check", "path", "register", "registered", "unwrap", "wrap"]
del _known
