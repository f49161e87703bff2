"""PEFT in and out: adapters, bundles, pools of adapters."""
