"""What `doctor` of both programs looks at: files, certificates, the broker. It changes nothing."""
