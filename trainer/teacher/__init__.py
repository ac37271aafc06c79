"""Problems without steps, or with too few -> the same problems with steps that a teacher wrote and we checked."""
