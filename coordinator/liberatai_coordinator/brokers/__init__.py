"""The brokers that a demo or a test starts: Mosquitto, or the embedded one."""
