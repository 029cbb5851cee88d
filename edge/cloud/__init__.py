"""The tail in the cloud, and the device session that asks it and answers by itself when it must."""
