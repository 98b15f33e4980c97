"""Do replicas follow demand? Real load of one real pod, and then the autoscalers' own rules over many such."""
