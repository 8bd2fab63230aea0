"""Tests of other projects that our optimizers cannot pass, by a part of their names, and why."""

CANNOT_PASS = {
    "torch": {
        "test_complex_AdamP": "a complex vector is not projected; its real form is, being a matrix",
        "test_complex_SGDP": "a complex vector is not projected; its real form is, being a matrix",
        "test_errors_AdamP": "betas are numbers, not tensors; a tensor lr needs no capturable",
        "test_errors_SGDP": "a tensor lr needs no capturable with foreach",
        "test_errors_SGDW": "a tensor lr needs no capturable with foreach",
    },
    "jettify": {},
    "kozistr": {
        "'use_gc': True": "gradient centralization is not an option of ours",
        "'weight_decouple': False": "decay is decoupled; L2 is torch.optim.SGD's weight_decay",
        "SGDP_({'lr': 0.5, 'weight_decay': 0.0001, 'nesterov': True}": "Nesterov needs a momentum",
        "test_init_group": "calls a private method of that project's classes",
        "TestBasicParameterValidation::test_learning_rate": "expects an error class of its own",
    },
    "timm": {},
}
