"""The SGLang releases this engine imitates, as a table of the rules in which they differ.

What all three share: log-probs of the tempered distribution, `output_ids` that keep the stop token,
`flush_cache: true` on every update unless the caller says otherwise, and a flush that fails while a request
holds KV. A real engine *asserts* that last rule after it has written the weights, and dies; this one refuses
before the first byte.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

DialectName = Literal["0.5.17", "0.5.19", "0.5.21"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialect:
    """The behaviour of one release.

    Attributes:
        name: The release, as `/server_info` reports it.
        has_update_session: `/begin_weight_update` and `/end_weight_update` exist; and updates outside them
            are refused.
        reports_version_spans: Finished replies carry `meta_info.weight_versions`.
    """

    name: DialectName
    has_update_session: bool
    reports_version_spans: bool


DIALECTS: dict[DialectName, Dialect] = {
    "0.5.17": Dialect(name="0.5.17", has_update_session=False, reports_version_spans=False),
    "0.5.19": Dialect(name="0.5.19", has_update_session=False, reports_version_spans=True),
    "0.5.21": Dialect(name="0.5.21", has_update_session=True, reports_version_spans=True),
}
