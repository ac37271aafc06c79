"""Problems: a question, steps (each a sub-question and its solution) and a final answer, from any source."""
