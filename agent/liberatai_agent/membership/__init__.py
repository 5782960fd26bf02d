"""Who the device is, how it gets a certificate and keeps it valid."""
