"""Carry bytes: one small protocol, a broker inside one process, and MQTT."""
