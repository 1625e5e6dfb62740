"""Maps of what a backbone sees in a scene."""

from geofm.maps.attention import AttentionMap, attention_map

__all__ = ('AttentionMap', 'attention_map')
