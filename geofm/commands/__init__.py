"""Commands of ``geofm`` beside those of Lightning: functions whose signature is their usage."""
