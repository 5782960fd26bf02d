"""What goes over the link: messages in and out, files, and how the link does."""
