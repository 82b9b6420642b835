"""Data as the field stores it: shards, lines and tables of captions, conversations, documents and edits; mixtures of them."""

from orthus.data.sources.mixture import Mixture, open_mixture
from orthus.data.sources.opening import RecordSource, open_source
from orthus.data.sources.settings import SourceSettings

__all__ = ["Mixture", "RecordSource", "SourceSettings", "open_mixture", "open_source"]
