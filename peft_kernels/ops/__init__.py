"""The ops by family. An op's class has its schema, its reference in plain torch, its fake kernel, its
gradient and its FLOPs, in this order; a family's typed calls are below its ops."""
