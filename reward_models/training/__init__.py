"""Making a scorer of preferences: losses, data, the fit, and preference pairs out of images."""
