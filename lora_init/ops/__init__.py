"""The ops that backends implement: schema, validation, dispatch and autograd, one file each."""
