"""The names of the served models, which clients in any language call: one contract, whatever runs behind it.

    anatomynet          CT          INT16  [z, y, x]   Hounsfield units; z to the head, y to the back, x to the
                                                       patient's left
                     -> LABEL_MAP   UINT8  [z, y, x]   of CT's shape: 0 background, 1..n the structures
                        CONFIDENCE  FP32   [n]         mean top probability over each structure's border voxels, at the
                                                       network's resolution, 0 to 1; 0 where absent
    anatomynet_region   CT_COARSE   INT16  [z, y, x]   Hounsfield units, axes as CT's; means of blocks of voxels
                     -> BOX         INT64  [6]         start z, y, x and stop z, y, x in voxels of CT_COARSE, half-open;
                                                       six zeros where nothing was found

A change of a name, a type or an axis breaks every client, those that others wrote among them. The exported graphs are
written as text with these names in it (export.onnx, export.slabs, export.region).
"""

MODEL_NAME, REGION_NAME = "anatomynet", "anatomynet_region"

CT, LABEL_MAP, CONFIDENCE = "CT", "LABEL_MAP", "CONFIDENCE"
CT_COARSE, BOX = "CT_COARSE", "BOX"

# Keys of the ModelConfig and the RegionConfig, as JSON. CONFIG_KEY: in a served model's parameters and a checkpoint's
# metadata. METADATA_KEY: in an ONNX file's metadata_props.
CONFIG_KEY, REGION_CONFIG_KEY = "model_config", "region_config"
METADATA_KEY, REGION_METADATA_KEY = "anatomynet", "anatomynet_region"
