"""The ops, one file per family. An op's class holds, in this order, its schema, what it means in plain torch,
its fake kernel and its gradient; the typed calls of a family stand below its ops."""
