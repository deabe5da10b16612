"""A grammar of short fables and of chats about them: the demo model's only teacher."""
