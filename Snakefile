# From a model to a page of figures. Each line below is a chapter; the settings are in params.yaml.
from snakemake.utils import min_version

min_version("9.0")


configfile: "params.yaml"


include: "workflow/rules/common.smk"  # settings, files, and what every job shares
include: "workflow/rules/prompts.smk"  # fetch_prompts, where the settings name prompts of others
include: "workflow/rules/calibration.smk"  # calibration_data -> reparameterize -> reconstruct -> calibrate -> analyze
include: "workflow/rules/artefact.smk"  # export -> sample
include: "workflow/rules/figures.smk"  # metrics -> summary -> report
include: "workflow/rules/image_reward.smk"  # aside: `snakemake image_reward`, with an environment of its own
include: "workflow/rules/proxy.smk"  # aside: `snakemake proxy`, what methods can be judged on a model


# All rows of the selected tier, measured and shown. (Snakemake honours a default target only here.)
rule all:
    default_target: True
    input:
        REPORT,


onstart:
    before_first_job()
